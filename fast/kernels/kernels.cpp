// CPU kernels for the hot loops of an episode. They compute what learner.py, metalearner.py and augment.py describe.
// library.py compiles and loads them; native.py checks the arguments and calls them.
//
// Tensors are contiguous. Images and activations are channels last: [images, height, width, channels]. T is float, or uint16_t
// for the bits of a bfloat16. Sums are float over a few rows and double beyond, always in the same order, so the number of
// threads changes no bit.

#include <type_traits>

#include "augment.h"
#include "convolution.h"
#include "first.h"
#include "learner.h"
#include "meta.h"

namespace {

template <class A>
constexpr char letter() {
  return std::is_pointer<A>::value ? 'p' : std::is_same<A, float>::value ? 'f' : 'l';
}
template <class... A>
struct Letters {
  static constexpr char text[] = {letter<A>()..., 0};
};
template <class... A>
constexpr const char* letters(void (*)(A...)) {
  return Letters<A...>::text;
}

}  // namespace

// Exports a function's address and the types of its arguments (p: pointer, f: float, l: 64-bit integer) for native.py.
#define EXPORT(name, function)                             \
  extern "C" {                                             \
  void* name##_address = reinterpret_cast<void*>(function); \
  const char* name##_arguments = letters(function);         \
  }
#define EXPORT_BOTH(name) EXPORT(name##_float, name<float>) EXPORT(name##_bfloat16, name<uint16_t>)

EXPORT(augment, augment)
EXPORT(convolve, convolve)
EXPORT(convolve_to_input, convolve_to_input)
EXPORT(convolve_to_filters, convolve_to_filters)
EXPORT(learner_gradient, learner_gradient<false>)
EXPORT(learner_gradient_frozen, learner_gradient<true>)
EXPORT(meta_forward, meta_forward)
EXPORT(meta_backward, meta_backward)
EXPORT_BOTH(block_forward)
EXPORT_BOTH(block_backward)
EXPORT_BOTH(block_eval)
EXPORT_BOTH(first_forward)
EXPORT_BOTH(first_backward)
EXPORT_BOTH(first_eval)
EXPORT_BOTH(patch_moments)
