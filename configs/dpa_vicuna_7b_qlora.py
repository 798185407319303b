_base_ = ['_base_/qlora.py']

llm_name_or_path = 'lmsys/vicuna-7b-v1.5'
family = 'vicuna'
