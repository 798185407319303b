_base_ = ['_base_/dpa.py']

llm_name_or_path = 'HuggingFaceTB/SmolLM3-3B'
family = 'smollm3'
