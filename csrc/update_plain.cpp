#define LORA_VECTOR 4
#define LORA_SHRINK shrink_plain
#define LORA_EXPAND expand_plain
#include "lora_kernels/update.h"
