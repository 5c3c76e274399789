// The instruction sets that every kernel is compiled for, and the choice between them.
//
// A kernel `void name(const Params&, int64_t begin, int64_t end)` is declared with DECLARE_KERNEL(name, Params),
// defined between BEGIN_KERNELS and END_KERNELS in csrc/cpu/name_kernel.cpp, and called as
// KERNEL(name)(params, begin, end).
#pragma once

#include <cstdint>

namespace mobilemamba {

// The last two run the kernels of kAvx512: on one the products of bfloat16 have instructions of their own, on the other
// they are the vendor's, which has matrix instructions.
enum class Capability { kDefault, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The best that this processor and ATEN_CPU_CAPABILITY allow, chosen once at load.
Capability capability();

// Channels in one vector register of the chosen instruction set.
inline int64_t vector_lanes() {
  return capability() >= Capability::kAvx512 ? 16 : capability() == Capability::kAvx2 ? 8 : 4;
}

}  // namespace mobilemamba

#ifdef MOBILEMAMBA_X86
#define DECLARE_KERNEL(name, Params)                                      \
  namespace mobilemamba {                                                 \
  namespace cpu_default { void name(const Params&, int64_t, int64_t); }   \
  namespace cpu_avx2 { void name(const Params&, int64_t, int64_t); }      \
  namespace cpu_avx512 { void name(const Params&, int64_t, int64_t); }    \
  }
#define KERNEL(name)                                                        \
  (mobilemamba::capability() >= mobilemamba::Capability::kAvx512 ? &mobilemamba::cpu_avx512::name \
   : mobilemamba::capability() == mobilemamba::Capability::kAvx2 ? &mobilemamba::cpu_avx2::name   \
                                                                 : &mobilemamba::cpu_default::name)
#else
#define DECLARE_KERNEL(name, Params) \
  namespace mobilemamba {            \
  namespace cpu_default { void name(const Params&, int64_t, int64_t); } \
  }
#define KERNEL(name) (&mobilemamba::cpu_default::name)
#endif
