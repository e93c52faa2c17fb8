// The rules run on host and device from the same lines.
#pragma once

#if defined(__CUDACC__)
#define LIGHTHOUSE_HOST_DEVICE __host__ __device__
#else
#define LIGHTHOUSE_HOST_DEVICE
#endif
