"""The files that import other model libraries: peft and transformers."""
