"""fastdiff in other people's programs, and their models in fastdiff.

`diffusers` and `transformers` name the modules that import those packages; nothing here is imported
before it is asked for.
"""
