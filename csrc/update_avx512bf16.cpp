#define LORA_VECTOR 16
#define LORA_SHRINK shrink_avx512bf16
#define LORA_EXPAND expand_avx512bf16
#include "lora_kernels/update.h"
