# The router's auxiliary loss is off, which is transformers' default (output_router_logits=False): in
# proxy and align the router is frozen, and tune moves it with a small learning rate for one epoch.
_base_ = ['_base_/dpa.py']

llm_name_or_path = 'Qwen/Qwen3-30B-A3B'
family = 'qwen3_moe'
