# The pipeline of studies/openmoji: the demo's, with the methods' own bounds of the weights. Data and
# budget are set on the command line.
_base_ = ['../../configs/dpa_smollm2_135m_openmoji.py']
# Nothing is resumed in the middle of a stage that takes a minute or two.
proxy = dict(save_steps=100000)
align = dict(save_steps=100000)
tune = dict(save_steps=100000, loss=dict(_delete_=True))
default_hooks = dict(checkpoint=dict(interval=-1, save_last=False))
