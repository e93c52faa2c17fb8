"""A process that has Transformers and nothing of ours: loads an exported folder and writes the logits of a few ids.

`export` starts this file by its path, with a JSON object on standard input. It imports nothing of the package, and
whatever else tries to fails. The trap: Python puts this file's folder first on the path, where `loss`, `checks` and the
others would be found by their bare names.
"""

import json
import sys


class Blocked:
    """First in `sys.meta_path`: `import lighthouse` and all below is an ImportError."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lighthouse":
            raise ImportError(f"{name} cannot be imported here: a plain folder must do without it")


def main():
    request = json.load(sys.stdin)
    sys.path[:] = [entry for entry in sys.path if entry not in request["hide"]]
    sys.meta_path.insert(0, Blocked())

    import torch
    import transformers

    torch.set_num_threads(request["threads"])
    auto = getattr(transformers, request["auto_class"])
    model, loading = auto.from_pretrained(
        request["folder"],
        dtype=torch.float32,
        attn_implementation="sdpa",
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    for weight in model.parameters():
        weight.data = weight.data.clone()  # a mapped file is aligned otherwise, which may round otherwise
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([request["ids"]]), use_cache=False)[0]
    tokens = None
    if request["has_tokenizer"]:
        tokens = transformers.AutoTokenizer.from_pretrained(request["folder"], local_files_only=True)(
            request["text"], add_special_tokens=False
        )["input_ids"]
    faults = {name: sorted(map(str, found)) for name, found in loading.items() if found}
    torch.save({"logits": logits, "tokens": tokens, "faults": faults, "class": type(model).__name__}, request["output"])


if __name__ == "__main__":
    main()
