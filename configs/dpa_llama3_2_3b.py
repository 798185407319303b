_base_ = ['_base_/dpa.py']

llm_name_or_path = 'meta-llama/Llama-3.2-3B-Instruct'
family = 'llama3_2'
