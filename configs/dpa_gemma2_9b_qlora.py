_base_ = ['_base_/qlora.py']

llm_name_or_path = 'google/gemma-2-9b-it'
family = 'gemma2'
