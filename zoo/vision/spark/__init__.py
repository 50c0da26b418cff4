"""SparK: masked-image pre-training of unmodified convnets (Tian et al., ICLR 2023)."""
