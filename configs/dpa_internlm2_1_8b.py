_base_ = ['_base_/dpa.py']

llm_name_or_path = 'internlm/internlm2_5-1_8b-chat'
family = 'internlm2'
