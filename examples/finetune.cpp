// Fine-tunes a language model on a text with a parameter-efficient method.
#include "examples/trainer/finetune_run.h"

int main(int argc, char** argv) {
  CLI::App app{
      "Fine-tunes a language model on a text with a parameter-efficient method.\n\n"
      "Example: finetune --model SmolLM2-135M-Instruct.Q4_1.gguf --data devil.txt --rank 16 "
      "--alpha 32 --steps 60 "
      "--output out",
      "finetune"};
  graft::trainer::FinetuneOptions options;
  graft::trainer::add_finetune_flags(app, options);
  return graft::trainer::run_program(app, argc, argv,
                                     [&] { return graft::trainer::run_finetune(options); });
}
