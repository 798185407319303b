_base_ = ['_base_/dpa.py']

llm_name_or_path = 'google/gemma-3-4b-it'
family = 'gemma3'
