// What the page says, in English and Chinese. Knows words; whoever shows them knows where.

const ENGLISH = {
  again: "Answer again", answered: "Answered: {text}", apiKey: "API key",
  apiKeyAsk: "This server asks for an API key.", apiKeyRemember: "Remember on this device", apiKeySave: "Use this key",
  appearance: "Appearance", arguments: "Arguments", brokenOff: "The connection broke off before the answer was complete.",
  cached: "{count} cached", call: "Call", cancel: "Cancel", close: "Close", code: "Code", continueRun: "Continue",
  contextUse: "{used} of {all} tokens of context used", conversation: "Conversation", conversations: "Conversations",
  copied: "Copied", copy: "Copy", copyMessage: "Copy message", default: "default", delete: "Delete “{title}”",
  deleteTool: "Delete tool {name}", deleted: "Conversation deleted.", dark: "Dark", edit: "Edit message", editTool: "Edit tool {name}",
  empty: "The model ended without writing an answer.", emptyLength: "The tokens ran out before the answer began: raise max tokens, or lower the thinking budget.",
  exampleClock: "What is the time in Tokyo?", exampleIntro: "Give me a short introduction to large language models.",
  exampleSum: "What is 1958 + 4783?", exampleWeather: "How is the weather in Beijing today?",
  exampleClockNote: "with the clock, which runs in this page", exampleIntroNote: "ask anything", exampleSumNote: "watch it think",
  exampleWeatherNote: "with a tool whose result you type", exportAll: "Export all", exportJson: "Export as JSON",
  exportMarkdown: "Export as Markdown", firstToken: "first token {seconds} s", import: "Import", importFailed: "{name} is no file of exported conversations.",
  imported: "{count} conversations imported.", invalidSetting: "{name} is {value}: it must be {range}.", keys: "Keyboard",
  keyCompose: "Go to the message", keyEdit: "Edit the last message (in an empty box)", keyHelp: "This list", keyNew: "New conversation", keySearch: "Search conversations",
  keySend: "Send", keyLine: "New line", keySettings: "Settings", keyStop: "Stop the answer, close what is open", language: "Language",
  length: "Cut off: the limit of tokens was reached.", light: "Light", loading: "Connecting to the server…", max_tokens: "Max tokens",
  menu: "Conversations", messageBox: "Message", messageHint: "Ask something", mock: "Result", mockHint: "Leave empty to type the result of each call yourself",
  model: "Model", more: "Export and shortcuts", newConversation: "New conversation", newTool: "New tool", noConversations: "No conversations yet", noMatch: "Nothing found",
  notKept: "This browser keeps nothing: export what you want to keep.", numberRange: "a number from {low} to {high}", openRange: "a number above {low} and up to {high}", page: "ran in this page",
  prompt: "prompt {count}", queueRetry: "Try again in {seconds} s.", rename: "Rename “{title}”", replaced: "Replaced.", result: "Result", resultAsk: "Result of {name}",
  resultHint: "What the tool returns, as JSON or text", retry: "Try again", sampling: "Sampling", save: "Save", saveAndSend: "Send", search: "Search",
  seed: "Seed", send: "Send", sendResult: "Send result", settings: "Settings", skip: "Skip to the message box", stop: "Stop", stopped: "Stopped.",
  system: "System", systemPrompt: "System prompt", systemHint: "How the model should behave in this conversation", table: "Table", temperature: "Temperature",
  theme: "Theme", thinking: "Thinking", thinkingBudget: "Thinking budget (tokens)", thinkingNow: "Thinking", thinkingOn: "Think before answering", thought: "Thought", thoughtFor: "Thought for {seconds} s",
  title: "Title", tokens: "{count} tokens", tool: "Tool", toolDefinition: "Definition (JSON)", toolNotJson: "The definition is not JSON: {detail}.",
  toolNoName: "The definition has no function name: give {\"name\", \"description\", \"parameters\"}.", toolTaken: "There is a tool named {detail} already: choose another name.",
  tools: "Tools", toolsOn: "Tools · {count}", top_k: "Top k", top_p: "Top p", typed: "typed by you", undo: "Undo", unlimited: "no limit",
  unreachable: "The server cannot be reached: is it running?", untitled: "New conversation", waiting: "Waiting for the first token", wholeRange: "a whole number from {low} to {high}",
  welcome: "Ask {model}", welcomeNote: "It thinks first, then answers. Everything stays between this browser and your server.",
  you: "You", yourResult: "waits for your result", speed: "{count} tokens/s", latest: "Go to the latest", calling: "The model calls {name}.", seconds: "{seconds} s", running: "Answering",
};

const CHINESE = {
  again: "重新回答", answered: "回答：{text}", apiKey: "API 密钥",
  apiKeyAsk: "此服务器需要 API 密钥。", apiKeyRemember: "保存在本设备", apiKeySave: "使用此密钥",
  appearance: "外观", arguments: "参数", brokenOff: "回答完成前连接中断了。",
  cached: "缓存 {count}", call: "调用", cancel: "取消", close: "关闭", code: "代码", continueRun: "继续",
  contextUse: "上下文 {all} 个词元，已用 {used} 个", conversation: "对话", conversations: "对话列表",
  copied: "已复制", copy: "复制", copyMessage: "复制消息", default: "默认", delete: "删除“{title}”",
  deleteTool: "删除工具 {name}", deleted: "对话已删除。", dark: "深色", edit: "编辑消息", editTool: "编辑工具 {name}",
  empty: "模型没有写出回答就结束了。", emptyLength: "回答开始前词元已用完：请调高最大词元数，或降低思考预算。",
  exampleClock: "东京的时间", exampleIntro: "简单介绍一下大语言模型。",
  exampleSum: "1958 + 4783 等于多少？", exampleWeather: "北京今天天气怎么样？",
  exampleClockNote: "使用在本页运行的时钟", exampleIntroNote: "随便问", exampleSumNote: "看它如何思考",
  exampleWeatherNote: "由你填写工具的结果", exportAll: "全部导出", exportJson: "导出为 JSON",
  exportMarkdown: "导出为 Markdown", firstToken: "首词元 {seconds} 秒", import: "导入", importFailed: "{name} 不是导出的对话文件。",
  imported: "已导入 {count} 个对话。", invalidSetting: "{name} 为 {value}：必须是{range}。", keys: "快捷键",
  keyCompose: "转到输入框", keyEdit: "编辑上一条消息（输入框为空时）", keyHelp: "显示此列表", keyNew: "新对话", keySearch: "搜索对话",
  keySend: "发送", keyLine: "换行", keySettings: "设置", keyStop: "停止回答、关闭面板", language: "语言",
  length: "已截断：达到词元上限。", light: "浅色", loading: "正在连接服务器…", max_tokens: "最大词元数",
  menu: "对话列表", messageBox: "消息", messageHint: "问点什么", mock: "结果", mockHint: "留空则每次调用由你填写结果",
  model: "模型", more: "导出与快捷键", newConversation: "新对话", newTool: "新工具", noConversations: "还没有对话", noMatch: "没有找到",
  notKept: "此浏览器不保存数据：请导出要保留的内容。", numberRange: " {low} 到 {high} 之间的数", openRange: "大于 {low} 且不超过 {high} 的数", page: "在本页运行",
  prompt: "提示 {count}", queueRetry: "请在 {seconds} 秒后重试。", rename: "重命名“{title}”", replaced: "已替换。", result: "结果", resultAsk: "{name} 的结果",
  resultHint: "工具返回的内容，JSON 或文本", retry: "重试", sampling: "采样", save: "保存", saveAndSend: "发送", search: "搜索",
  seed: "随机种子", send: "发送", sendResult: "发送结果", settings: "设置", skip: "跳到输入框", stop: "停止", stopped: "已停止。",
  system: "跟随系统", systemPrompt: "系统提示", systemHint: "模型在此对话中应如何表现", table: "表格", temperature: "温度",
  theme: "主题", thinking: "思考", thinkingBudget: "思考预算（词元）", thinkingNow: "思考中", thinkingOn: "先思考再回答", thought: "思考", thoughtFor: "思考了 {seconds} 秒",
  title: "标题", tokens: "{count} 词元", tool: "工具", toolDefinition: "定义（JSON）", toolNotJson: "定义不是 JSON：{detail}。",
  toolNoName: "定义缺少函数名：请给出 {\"name\", \"description\", \"parameters\"}。", toolTaken: "已有名为 {detail} 的工具：请换一个名称。",
  tools: "工具", toolsOn: "工具 · {count}", top_k: "Top k", top_p: "Top p", typed: "由你填写", undo: "撤销", unlimited: "不限",
  unreachable: "无法连接服务器：它在运行吗？", untitled: "新对话", waiting: "等待首个词元", wholeRange: " {low} 到 {high} 之间的整数",
  welcome: "向 {model} 提问", welcomeNote: "它先思考，再回答。一切只在此浏览器与你的服务器之间。",
  you: "你", yourResult: "等待你填写结果", speed: "{count} 词元/秒", latest: "转到最新", calling: "模型调用了 {name}。", seconds: "{seconds} 秒", running: "正在回答",
};

export const LANGUAGES = { en: ["English", ENGLISH], zh: ["中文", CHINESE] };

let current = "en";

/** The language that the user chose, else the browser's, else English. */
export function chooseLanguage(chosen) {
  current = chosen ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
  document.documentElement.lang = current === "zh" ? "zh-Hans" : "en";
  return current;
}

/** A sentence with its `{places}` filled; a place that no value is given for stays as it is. */
export function t(key, values = {}) {
  const text = LANGUAGES[current][1][key];
  if (text === undefined) throw new Error(`There is no text ${key}.`);
  return text.replace(/\{(\w+)\}/g, (place, name) => (name in values ? String(values[name]) : place));
}

/** Whole numbers as the language writes them; seconds with one decimal below ten. */
export const count = (number) => number.toLocaleString(current);
export const seconds = (milliseconds) => {
  const value = milliseconds / 1000;
  return value < 10 ? value.toFixed(1) : String(Math.round(value));
};

/** Fill the markup's own texts: `data-text` is shown, `data-label` is read out, `data-hint` stands in an empty field. */
export function fillTexts(root = document) {
  for (const node of root.querySelectorAll("[data-text]")) node.textContent = t(node.dataset.text);
  for (const node of root.querySelectorAll("[data-label]")) {
    node.setAttribute("aria-label", t(node.dataset.label));
    if (node.tagName === "BUTTON") node.title = t(node.dataset.label);
  }
  for (const node of root.querySelectorAll("[data-hint]")) node.placeholder = t(node.dataset.hint);
}
