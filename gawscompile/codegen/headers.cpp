// What every kernel includes. g++ reads it once for all of them (`build.py`), yet each header costs every kernel something,
// so torch's numbers of 16 bits, <vector> and <algorithm> stay out.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#else
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#endif
#include <omp.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
