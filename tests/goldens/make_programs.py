"""Goldens of the programs: a tiny Llama folder, logits, a PEFT adapter and the losses of PEFT's own training.

usage: make_programs.py OUT_DIR      (needs torch, transformers, peft; writes about 150 KiB)
The tokenizer is byte level without merges: a token's id is its byte.
"""
import json, os, sys

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def byte_alphabet():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(rest)}}


out = sys.argv[1]
model_dir = os.path.join(out, "tiny")
torch.manual_seed(0)
config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True,
                     initializer_range=0.1, bos_token_id=None, eos_token_id=None,
                     rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                      "high_freq_factor": 4.0, "original_max_position_embeddings": 32})
base = LlamaForCausalLM(config).float().eval()
base.save_pretrained(model_dir)
tokenizer = Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model_dir)
os.chmod(os.path.join(model_dir, "model.safetensors"), 0o644)

ids = torch.tensor([[1, 5, 9, 200, 33, 44, 17, 99]])
with torch.no_grad():
    base_logits = base(ids).logits[0].clone()

text = "".join(f"Entry {i}: a word, n. The {'abcdefgh'[i % 8] * (i % 5 + 1)} of {i * i}.\n" for i in range(40))
open(os.path.join(out, "text.txt"), "w").write(text)

torch.manual_seed(1)
model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"],
                                        task_type="CAUSAL_LM"))
model.save_pretrained(os.path.join(out, "start"))
parameters = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
seq, batch, steps = 32, 2, 8
tokens = torch.tensor(list(text.encode()))
chunks = tokens[: len(tokens) // seq * seq].view(-1, seq)
losses = []
model.train()
for step in range(steps):
    rows = chunks[[(step * batch + j) % len(chunks) for j in range(batch)]]
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
model.save_pretrained(os.path.join(out, "trained"))
model.eval()
with torch.no_grad():
    adapted_logits = model(ids).logits[0]
save_file({"base": base_logits, "adapted": adapted_logits.contiguous()}, os.path.join(out, "logits.safetensors"))
json.dump({"ids": ids[0].tolist(), "losses": losses}, open(os.path.join(out, "expected.json"), "w"), indent=1)
for folder in ("start", "trained"):
    readme = os.path.join(out, folder, "README.md")
    if os.path.exists(readme):
        os.remove(readme)
