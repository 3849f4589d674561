"""Networks: tensors in, tensors out. They import torch only and know nothing of training or data."""
