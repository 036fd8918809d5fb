"""Our own networks of the Stable Diffusion family: plain torch, named weight by weight as the checkpoints' files are.

`choice.py` says for a component's class and config whether one of these draws it, or diffusers' or transformers' class.
"""
