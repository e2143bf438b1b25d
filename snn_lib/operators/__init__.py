"""The two operators as PyTorch sees them: checked, differentiated and mapped.

``iir_filter`` and ``spiking_neuron`` each register a ``torch.library`` custom operator on folded
features, sequences ``(T, B, N)``, and one for its backward pass. ``checks`` and ``transforms`` hold
what both use. An operator runs on the backend that serves its tensors, see ``snn_lib.kernels``.

``torch.library`` gives an operator reverse-mode derivatives. Forward mode and the transforms of
``torch.func`` need an ``autograd.Function`` around it, which is slower and which ``torch.compile``
does not take. Each operator therefore has such a Function too, which runs only where a transform is
at work. Both ways share one backward pass, and both refuse second derivatives.
"""
