"""fastdiff in other people's programs, and their models and weights in fastdiff.

`diffusers`: a backbone as a diffusers model, and a pipeline. `denoisers`: k-diffusion's and EDM's
calls. `accelerate`: fused ops inside models of diffusers and transformers. `importers`, `verify`:
weights of U-ViT, guided-diffusion and hana. diffusers is imported in the module of its name alone.
"""
