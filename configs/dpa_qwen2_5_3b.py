_base_ = ['_base_/dpa.py']

llm_name_or_path = 'Qwen/Qwen2.5-3B-Instruct'
family = 'qwen2_5'
