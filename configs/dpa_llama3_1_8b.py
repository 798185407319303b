_base_ = ['_base_/dpa.py']

llm_name_or_path = 'meta-llama/Llama-3.1-8B-Instruct'
prompt_template = 'llama3_chat'

model = dict(llm=dict(type='transformers.LlamaForCausalLM.from_pretrained'))
