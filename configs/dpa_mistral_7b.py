_base_ = ['_base_/dpa.py']

llm_name_or_path = 'mistralai/Mistral-7B-Instruct-v0.3'
family = 'mistral'
