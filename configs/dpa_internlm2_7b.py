_base_ = ['_base_/dpa.py']

llm_name_or_path = 'internlm/internlm2_5-7b-chat'
prompt_template = 'internlm2_chat'

# Loaded as a LLaMA, so that no remote code is needed.
model = dict(
    llm=dict(type='dpa_xtuner.model.internlm2.InternLM2ForCausalLM.from_pretrained'))
tokenizer = dict(type='dpa_xtuner.families.tokenizer.InternLMTokenizer.from_pretrained')
