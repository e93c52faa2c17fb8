// Empty: stands in for libtorch.so at link time, so that liblighthouse.so names it as needed (torch.cmake).
