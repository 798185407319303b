_base_ = ['_base_/dpa.py']

llm_name_or_path = 'internlm/internlm2_5-7b-chat'
prompt_template = 'internlm2_chat'

# The modelling code that XTuner ships, so that no remote code is needed.
model = dict(
    llm=dict(type='xtuner._lite.modelings.internlm2.InternLM2ForCausalLM.from_pretrained'))
# InternLM2's tokenizer is code in its own repository, as in XTuner's configs for it.
tokenizer = dict(trust_remote_code=True)
