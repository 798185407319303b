_base_ = ['_base_/qlora.py']

llm_name_or_path = 'internlm/internlm2_5-7b-chat'
family = 'internlm2'
