// Which of the compiled instruction sets runs.
#pragma once
#include "copy.h"
#include "plan.h"

namespace hf_paged {

// The entries of the ISA in use, by Dtype: the widest that the processor has, unless another was asked for.
const Work* work_in_use();
// The same for pages of codes, by Codes.
const CodeEntries* codes_in_use();

}  // namespace hf_paged

extern "C" {
// Names of the ISAs that this processor has, the widest last, separated by spaces.
const char* hf_paged_isas();
// The ISA in use.
const char* hf_paged_isa();
// Use the ISA of that name from now on; false and no change if the processor has none such.
bool hf_paged_use_isa(const char* name);
}
