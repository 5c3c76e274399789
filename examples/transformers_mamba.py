"""Hugging Face transformers: Mamba on a CPU without the Python loop. Needs ``pip install transformers``."""

import time

import torch
from transformers import MambaConfig, MambaForCausalLM

import mobilemamba_kernels

config = MambaConfig(vocab_size=1000, hidden_size=256, num_hidden_layers=4, state_size=16)
model = MambaForCausalLM(config).eval()  # or MambaForCausalLM.from_pretrained("state-spaces/mamba-130m-hf")
prompt = torch.randint(1000, (1, 256))


def seconds() -> tuple[float, list[int]]:
    start = time.perf_counter()
    tokens = model.generate(prompt, max_new_tokens=16, do_sample=False, pad_token_id=0)
    return time.perf_counter() - start, tokens[0, 256:].tolist()


seconds()
before, expected = seconds()
mobilemamba_kernels.patch("transformers")  # the one line; a model that exists is faster at once
after, found = seconds()
assert found == expected
print(f"256 tokens read and 16 written: {before:.2f} s, patched {after:.2f} s, the same tokens")
