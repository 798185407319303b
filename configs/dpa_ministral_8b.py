_base_ = ['_base_/dpa.py']

llm_name_or_path = 'mistralai/Ministral-8B-Instruct-2410'
family = 'ministral'
