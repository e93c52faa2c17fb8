"""`lighthouse doctor`: whether Lighthouse can train on this machine, and the command that fixes what is wrong.

A package beside `lighthouse` and not inside it, since it has to work where `import lighthouse` fails. Only checks
import torch or lighthouse, each when it runs, and they run in another process (`examination`).
"""

from lighthouse_doctor.examination import CHECKS, examine
from lighthouse_doctor.line import Line, can_train, verdict

__all__ = ["CHECKS", "Line", "can_train", "examine", "verdict"]
