#define LORA_VECTOR 8
#define LORA_SHRINK shrink_avx2
#define LORA_EXPAND expand_avx2
#include "lora_kernels/update.h"
