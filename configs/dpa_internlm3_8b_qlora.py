_base_ = ['_base_/qlora.py']

llm_name_or_path = 'internlm/internlm3-8b-instruct'
family = 'internlm3'
