_base_ = ['_base_/qlora.py']

llm_name_or_path = 'meta-llama/Llama-3.1-8B-Instruct'
family = 'llama3_1'
