_base_ = ['_base_/dpa.py']

llm_name_or_path = 'lmsys/vicuna-13b-v1.5'
family = 'vicuna'
