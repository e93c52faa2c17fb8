"""`lighthouse doctor`: whether Lighthouse can train on this machine, and the command that mends what is not fine.

A package beside `lighthouse` and not inside it, since it has to work where `import lighthouse` fails. The trap: only
checks import torch or lighthouse, each when it runs, and they run in another process (`examination`).
"""

from lighthouse_doctor.examination import CHECKS, examine
from lighthouse_doctor.line import Line, can_train, verdict

__all__ = ["CHECKS", "Line", "can_train", "examine", "verdict"]
