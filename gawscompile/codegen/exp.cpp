// exp and tanh, of the vectors of Sleef in libtorch_cpu. Only sources that say `links torch` are linked with it.
#if defined(CPU_CAPABILITY_AVX512)
extern "C" __m512 Sleef_expf16_u10(__m512);
extern "C" __m512 Sleef_tanhf16_u10(__m512);
inline F exp(const F& v) { return Sleef_expf16_u10(v); }
inline F tanh(const F& v) { return Sleef_tanhf16_u10(v); }
#elif defined(CPU_CAPABILITY_AVX2)
extern "C" __m256 Sleef_expf8_u10(__m256);
extern "C" __m256 Sleef_tanhf8_u10(__m256);
inline F exp(const F& v) { return Sleef_expf8_u10(v); }
inline F tanh(const F& v) { return Sleef_tanhf8_u10(v); }
#else
inline F exp(const F& v) { return v.exp(); }
inline F tanh(const F& v) { return v.tanh(); }
#endif
