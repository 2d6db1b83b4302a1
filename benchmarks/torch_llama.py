"""The other side of against_torch.py for Llama: the model of `transformers`, by an interpreter that has it.

As its users run it: eager, float32, scaled_dot_product_attention, PyTorch's fused AdamW, gradients clipped; text is generated
by `model.generate`, greedily, through its cache. Gets its sizes as JSON, prints "ready" and versions; then works once for
each line of stdin, and prints the seconds.
"""

import json
import sys
import time

import torch
import transformers
from torch import nn
from torch.nn import functional as F


def make_model(sizes: dict[str, int]) -> nn.Module:
    """Returns a Llama of random weights."""
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["width"],
        intermediate_size=sizes["mlp_width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        max_position_embeddings=sizes["length"],
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def trained(model: nn.Module, sizes: dict[str, int]):
    """Yields after each training step."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim < 2 or "embed" in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    tokens = torch.randint(0, sizes["vocabulary"], (sizes["batch"], sizes["length"] + 1))
    while True:
        optimizer.zero_grad()
        logits = model(tokens[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield


@torch.inference_mode()
def generated(model: nn.Module, sizes: dict[str, int]):
    """Yields after each generation of `new_tokens` tokens."""
    model.eval()
    prompt = torch.randint(0, sizes["vocabulary"], (sizes["batch"], sizes["prompt"]))
    while True:
        found = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=sizes["new_tokens"], do_sample=False
        )
        assert found.shape[1] == sizes["prompt"] + sizes["new_tokens"]
        yield


def main(sizes: dict[str, int]) -> None:
    """Works once for each line of stdin."""
    torch.set_num_threads(sizes["threads"])
    turns = (generated if sizes["new_tokens"] else trained)(make_model(sizes), sizes)
    print(f"ready {torch.__version__}, transformers {transformers.__version__}", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        next(turns)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
