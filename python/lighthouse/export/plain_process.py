"""A process that has Transformers and nothing of ours: loads an exported folder, and gives its logits or its speed.

`plain.py` starts this file by its path, with a JSON object on standard input. It imports nothing of the package, and
whatever else tries to fails. Python puts this file's folder first on the path, where `loss`, `checks` and the
others would be found by their bare names.
"""

import collections
import json
import statistics
import sys
import time


class Blocked:
    """First in `sys.meta_path`: `import lighthouse` and all below is an ImportError."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lighthouse":
            raise ImportError(f"{name} cannot be imported here: a plain folder must work without it")


def main():
    request = json.load(sys.stdin)
    sys.path[:] = [entry for entry in sys.path if entry not in request["hide"]]
    sys.meta_path.insert(0, Blocked())

    import torch

    torch.set_num_threads(request["threads"])
    torch.save(TASKS[request["task"]](request), request["output"])


def load(request, dtype, device="cpu"):
    """The folder's model, and what was wrong with it while it was loaded."""
    import transformers

    model, loading = getattr(transformers, request["auto_class"]).from_pretrained(
        request["folder"],
        dtype=dtype,
        attn_implementation="sdpa",
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    for weight in model.parameters():
        weight.data = weight.data.clone()  # a mapped file is aligned differently, which may round differently
    return model.to(device).eval(), {name: sorted(map(str, found)) for name, found in loading.items() if found}


def logits(request):
    """The logits of `ids` on the CPU in float32, and the tokenizer's ids of `text`."""
    import torch
    import transformers

    model, faults = load(request, torch.float32)
    with torch.inference_mode():
        found = model(torch.tensor([request["ids"]]), use_cache=False)[0]
    tokens = None
    if request["has_tokenizer"]:
        tokens = transformers.AutoTokenizer.from_pretrained(request["folder"], local_files_only=True)(
            request["text"], add_special_tokens=False
        )["input_ids"]
    return {"logits": found, "tokens": tokens, "faults": faults, "class": type(model).__name__}


def inference(request):
    """Prefill and decoding of the folder's model and of one built from its configuration alone, with its weights.

    The two are called in turn, in changing order, so other load on the machine affects both. A first round warms up
    and compares the outputs.
    """
    import torch
    import transformers

    device, dtype = torch.device(request["device"]), getattr(torch, request["dtype"])
    exported, faults = load(request, dtype, device)
    config = transformers.AutoConfig.from_pretrained(request["folder"], local_files_only=True)
    auto = getattr(transformers, request["auto_class"])
    plain = auto.from_config(config, attn_implementation="sdpa", dtype=dtype).to(device).eval()
    plain.load_state_dict(exported.state_dict())  # strict: the same names
    vocabulary = config.vocab_size
    ids = torch.tensor([[(7919 * place + 1) % vocabulary for place in range(request["prompt"])]], device=device)

    def synchronize():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def generate(model):
        begin = synchronize()
        output = model(ids, use_cache=True, logits_to_keep=1)
        filled = synchronize()
        first, tokens = output.logits, []
        for _ in range(request["new_tokens"]):
            tokens.append(output.logits[:, -1:].argmax(-1))
            output = model(tokens[-1], past_key_values=output.past_key_values, use_cache=True)
        done = synchronize()
        return filled - begin, (done - filled) / request["new_tokens"], first, torch.cat(tokens)

    times: dict[str, list] = {"exported": [], "plain": []}
    with torch.inference_mode():
        begin = time.perf_counter()
        *_, one_logits, one_tokens = generate(exported)
        *_, two_logits, two_tokens = generate(plain)
        round_seconds = time.perf_counter() - begin
        rounds = max(1, min(request["rounds"], int(request["budget"] / round_seconds)))
        for number in range(rounds):
            sides = [("exported", exported), ("plain", plain)]
            for side, model in sides if number % 2 else sides[::-1]:
                times[side].append(generate(model)[:2])
    medians = {side: [statistics.median(column) for column in zip(*found)] for side, found in times.items()}  # noqa: B905
    modules = collections.Counter(type(module).__module__.partition(".")[0] for module in exported.modules())
    return {
        "seconds": medians,
        "rounds": rounds,
        "same_outputs": torch.equal(one_logits, two_logits) and torch.equal(one_tokens, two_tokens),
        "modules": dict(modules),
        "class": type(exported).__name__,
        "faults": faults,
        "imported": sorted(name for name in sys.modules if name.partition(".")[0] == "lighthouse"),
    }


TASKS = {"logits": logits, "inference": inference}

if __name__ == "__main__":
    main()
