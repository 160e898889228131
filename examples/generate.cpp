// Continues a prompt with a model, plain or adapted.
#include <graft/core/error.h>
#include <unistd.h>

#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "examples/text/chat_template.h"
#include "examples/trainer/generation.h"
#include "examples/trainer/program.h"

namespace {

using namespace graft;

// The prompt as the model's chat template wraps a user's message.
std::string as_chat(const std::string& prompt, const text::Tokenizer& tokenizer) {
  GRAFT_CHECK(!tokenizer.chat_template().empty(), "generate",
              "--chat needs a model with a chat template; got none");
  const nlohmann::ordered_json messages = {{{"role", "user"}, {"content", prompt}}};
  return text::render_chat_template(tokenizer.chat_template(), messages,
                                    {.add_generation_prompt = true,
                                     .bos_token = tokenizer.bos_token(),
                                     .eos_token = tokenizer.eos_token()});
}

std::string standard_input() {
  return {std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>()};
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{
      "Continues a prompt with a model, plain or adapted. The prompt comes from --prompt or "
      "standard input.\n\n"
      "Example: generate --model model.gguf --adapter out --prompt \"LOVE, n.\" --max-new-tokens "
      "60",
      "generate"};
  trainer::CommonOptions common;
  trainer::GenerationOptions options;
  std::optional<std::string> prompt;
  bool chat = false, merge = false;
  trainer::add_common_flags(app, common, /*adapter=*/true);
  const char* group = "Generation";
  app.add_option("--prompt", prompt, "text to continue [standard input]")->group(group);
  app.add_option("--max-new-tokens", options.max_new_tokens, "limit")
      ->capture_default_str()
      ->group(group);
  app.add_option("--temperature", options.temperature, "0: always the likeliest token")
      ->capture_default_str()
      ->group(group);
  app.add_option("--top-p", options.top_p,
                 "sample among the likeliest tokens with this much probability")
      ->capture_default_str()
      ->group(group);
  app.add_flag("--chat", chat, "wrap the prompt in the model's chat template")->group(group);
  app.add_flag("--merge", merge, "merge the adapter first: the same text, faster")->group(group);

  return trainer::run_program(app, argc, argv, [&] {
    options.seed = common.seed;
    options.validate();
    if (merge && common.adapters.empty())
      throw trainer::UsageError("[usage] --merge needs --adapter");
    trainer::apply_common(common);
    if (!prompt) prompt = standard_input();
    models::LoadedModel model =
        models::load(common.model, trainer::compute_dtype(common), trainer::compute_device(common));
    auto adapter = trainer::attach_adapters(*model.decoder, common);
    if (merge) adapter->merge();
    const std::string input = chat ? as_chat(*prompt, model.tokenizer) : *prompt;
    const bool stream = !common.json;
    const std::string text =
        trainer::generate(model, input, options, !chat, [&](const std::string& piece) {
          if (stream) std::cout << piece << std::flush;
        });
    if (stream)
      std::cout << std::endl;
    else
      std::cout << nlohmann::ordered_json{{"prompt", *prompt}, {"text", text}}.dump() << std::endl;
    return 0;
  });
}
