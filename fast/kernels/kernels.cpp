// CPU kernels for the hot loops of an episode. They compute what learner.py, metalearner.py and augment.py describe.
// library.py compiles and loads them; native.py checks the arguments and calls them.
//
// Tensors are contiguous. Images and activations are channels last: [images, height, width, channels]. Sums are float
// over a few rows (the moments' over one image) and double beyond, always in the same order, so the number of threads changes no
// bit.

#include <type_traits>

#include "augment.h"
#include "convolution.h"
#include "first.h"
#include "learner.h"
#include "meta.h"

namespace {

template <class... A>
const char* letters(void (*)(A...)) {
  static constexpr char text[] = {(std::is_pointer_v<A> ? 'p' : std::is_same_v<A, float> ? 'f' : 'l')..., 0};
  return text;
}

}  // namespace

// Calls a function; 0 if there is no memory for it: an exception cannot pass through Python's caller.
template <auto function, class... A>
int guarded(A... arguments) {
  try {
    function(arguments...);
    return 1;
  } catch (const std::bad_alloc&) {
    return 0;
  }
}

template <auto function, class... A>
void* address(void (*)(A...)) {
  return reinterpret_cast<void*>(&guarded<function, A...>);
}

// Exports a function's address and the types of its arguments (p: pointer, f: float, l: 64-bit integer) for library.py.
#define EXPORT(name, function)                             \
  extern "C" {                                             \
  void* name##_address = address<function>(function);       \
  const char* name##_arguments = letters(function);         \
  }

extern "C" {
#ifdef _OPENMP
int parallel = 1;
#else
int parallel = 0;
#endif
}
EXPORT(augment, augment)
EXPORT(convolve, convolve)
EXPORT(convolve_to_filters, convolve_to_filters)
EXPORT(block_forward, block_forward<>)
EXPORT(block_backward, block_backward)
EXPORT(block_eval, block_eval)
EXPORT(first_forward, first_forward<>)
EXPORT(first_backward, first_backward)
EXPORT(first_eval, first_eval)
EXPORT(patch_moments, patch_moments)
EXPORT(learner_gradient, learner_gradient<false>)
EXPORT(learner_gradient_frozen, learner_gradient<true>)
EXPORT(meta_forward, meta_forward)
EXPORT(meta_backward, meta_backward)
