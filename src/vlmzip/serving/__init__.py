"""Serving: what answers other programs with compressed images.

`server` answers over HTTP as OpenAI's API does, `store` keeps compressed images in files, and `vllm` is a plugin for
vLLM.
"""
