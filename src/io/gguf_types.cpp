#include "gguf_types.h"

#include <array>

namespace graft::io {
namespace {

constexpr auto kNone = at::ScalarType::Undefined;

// Numbers, names and block sizes: https://github.com/ggml-org/ggml/blob/master/include/ggml.h and
// ggml-common.h.
constexpr std::array kTypes{
    GgufType{0, "F32", 1, 4, at::kFloat, nullptr},
    GgufType{1, "F16", 1, 2, at::kHalf, nullptr},
    GgufType{2, "Q4_0", 32, 18, at::kFloat, dequantize_q4_0},
    GgufType{3, "Q4_1", 32, 20, at::kFloat, dequantize_q4_1},
    GgufType{6, "Q5_0", 32, 22, at::kFloat, dequantize_q5_0},
    GgufType{7, "Q5_1", 32, 24, at::kFloat, dequantize_q5_1},
    GgufType{8, "Q8_0", 32, 34, at::kFloat, dequantize_q8_0},
    GgufType{9, "Q8_1", 32, 40, kNone, nullptr},
    GgufType{10, "Q2_K", 256, 84, at::kFloat, dequantize_q2_k},
    GgufType{11, "Q3_K", 256, 110, at::kFloat, dequantize_q3_k},
    GgufType{12, "Q4_K", 256, 144, at::kFloat, dequantize_q4_k},
    GgufType{13, "Q5_K", 256, 176, at::kFloat, dequantize_q5_k},
    GgufType{14, "Q6_K", 256, 210, at::kFloat, dequantize_q6_k},
    GgufType{15, "Q8_K", 256, 292, kNone, nullptr},
    GgufType{16, "IQ2_XXS", 256, 66, kNone, nullptr},
    GgufType{17, "IQ2_XS", 256, 74, kNone, nullptr},
    GgufType{18, "IQ3_XXS", 256, 98, kNone, nullptr},
    GgufType{19, "IQ1_S", 256, 50, kNone, nullptr},
    GgufType{20, "IQ4_NL", 32, 18, kNone, nullptr},
    GgufType{21, "IQ3_S", 256, 110, kNone, nullptr},
    GgufType{22, "IQ2_S", 256, 82, kNone, nullptr},
    GgufType{23, "IQ4_XS", 256, 136, kNone, nullptr},
    GgufType{24, "I8", 1, 1, at::kChar, nullptr},
    GgufType{25, "I16", 1, 2, at::kShort, nullptr},
    GgufType{26, "I32", 1, 4, at::kInt, nullptr},
    GgufType{27, "I64", 1, 8, at::kLong, nullptr},
    GgufType{28, "F64", 1, 8, at::kDouble, nullptr},
    GgufType{29, "IQ1_M", 256, 56, kNone, nullptr},
    GgufType{30, "BF16", 1, 2, at::kBFloat16, nullptr},
    GgufType{34, "TQ1_0", 256, 54, kNone, nullptr},
    GgufType{35, "TQ2_0", 256, 66, kNone, nullptr},
    GgufType{39, "MXFP4", 32, 17, kNone, nullptr},
    GgufType{40, "NVFP4", 64, 36, kNone, nullptr},
    GgufType{41, "Q1_0", 128, 18, kNone, nullptr},
};

}  // namespace

const GgufType* find_gguf_type(uint32_t id) {
  for (const GgufType& type : kTypes) {
    if (type.id == id) return &type;
  }
  return nullptr;
}

}  // namespace graft::io
