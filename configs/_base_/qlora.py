# The base of the QLoRA configs, for one GPU of 24 GB: the LLM in 4 bit in all stages, and LoRA in
# proxy and tune. Computed by: python tools/memory.py dpa_qwen2_5_7b_qlora --gpus 1 --zero 0
_base_ = ['dpa.py']

model = dict(
    llm=dict(
        quantization_config=dict(
            type='transformers.BitsAndBytesConfig',
            load_in_4bit=True,
            bnb_4bit_quant_type='nf4',
            bnb_4bit_use_double_quant=True)))  # [xtuner]

# A smaller rank leaves memory for longer samples [ours].
proxy = dict(batch_size=2, max_length=2048, lora=dict(r=128, lora_alpha=256))
align = dict(batch_size=2, max_length=2048)
tune = dict(batch_size=2, train_llm='lora', lora=dict(r=128, lora_alpha=256))
