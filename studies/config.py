# The pipeline of the study: a DPA config for the small world, as `xtuner train` takes it. What varies
# between runs (method, seed, level, share, variant) is set by studies/run.py. All numbers are [ours].
_base_ = ['../configs/_base_/dpa.py']
custom_imports = dict(imports=['dpa_xtuner.plugin', 'studies.measure'], allow_failed_imports=False)

llm_name_or_path = '{{$DPA_WORLD:world}}/llm'
visual_encoder_name_or_path = '{{$DPA_WORLD:world}}/encoder'
precision = 'fp32'  # the same on every machine
prompt_template = dict(INSTRUCTION='{input} answer :', SUFFIX=' .', SUFFIX_AS_EOS=True)

captions = dict(
    data_path='{{$DPA_WORLD:world}}/captions.jsonl', image_folder='{{$DPA_WORLD:world}}',
    held_out=256)
instructions = dict(
    data_path='{{$DPA_WORLD:world}}/questions.jsonl', image_folder='{{$DPA_WORLD:world}}')

# One epoch in each stage, as in the paper.
proxy = dict(
    lr=5e-4, batch_size=32, global_batch_size=32, max_length=128, save_steps=100000,
    pad_image_to_square=False, lora=dict(r=32, lora_alpha=64))
align = dict(
    lr=5e-3, batch_size=32, global_batch_size=32, max_length=128, save_steps=100000,
    pad_image_to_square=False)
tune = dict(
    lr=1e-3, batch_size=32, global_batch_size=32, max_length=128, save_steps=100000,
    pad_image_to_square=False, lora=dict(r=32, lora_alpha=64))

model = dict(
    llm=dict(type='transformers.LlamaForCausalLM.from_pretrained'),
    use_activation_checkpointing=False)
train_dataloader = dict(num_workers=0, pin_memory=False)
default_hooks = dict(
    logger=dict(interval=50),
    # Nothing is resumed in the middle of a stage that takes seconds.
    checkpoint=dict(type='CheckpointHook', interval=-1, save_last=False))
custom_hooks = [dict(type='StudyHook', questions='{{$DPA_WORLD:world}}/asked.jsonl', every=25)]
