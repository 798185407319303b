_base_ = ['_base_/qlora.py']

llm_name_or_path = 'Qwen/Qwen2.5-7B-Instruct'
family = 'qwen2_5'
