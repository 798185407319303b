_base_ = ['_base_/dpa.py']

llm_name_or_path = 'lmsys/vicuna-7b-v1.5'
family = 'vicuna'
