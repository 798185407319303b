_base_ = ['_base_/dpa.py']

llm_name_or_path = 'Qwen/Qwen3-8B'
family = 'qwen3'
