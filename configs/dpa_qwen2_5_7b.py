_base_ = ['_base_/dpa.py']

llm_name_or_path = 'Qwen/Qwen2.5-7B-Instruct'
prompt_template = 'qwen_chat'

model = dict(llm=dict(type='transformers.Qwen2ForCausalLM.from_pretrained'))
