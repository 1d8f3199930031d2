"""What every method and host stands on; imports torch, numpy and safetensors only."""
