// The demo tool's clock: the time at a place. Knows time zones and what some places are called; the browser knows the rest.

const PLACES = {
  "America/Chicago": ["austin", "dallas", "houston", "芝加哥"],
  "America/Los_Angeles": ["san francisco", "seattle", "las vegas", "san diego", "洛杉矶", "旧金山"],
  "America/New_York": ["boston", "washington", "miami", "atlanta", "纽约", "波士顿"],
  "America/Toronto": ["montreal", "ottawa", "多伦多"],
  "Asia/Dubai": ["迪拜"],
  "Asia/Bangkok": ["曼谷"],
  "Asia/Hong_Kong": ["香港"],
  "Asia/Kolkata": ["mumbai", "delhi", "new delhi", "bangalore", "bengaluru", "chennai", "india", "孟买", "新德里"],
  "Asia/Seoul": ["busan", "korea", "首尔"],
  "Asia/Shanghai": [
    "beijing", "shenzhen", "guangzhou", "chengdu", "hangzhou", "nanjing", "wuhan", "tianjin", "china", "中国",
    "北京", "上海", "广州", "深圳", "成都", "杭州", "南京", "武汉", "西安", "重庆", "天津", "苏州",
  ],
  "Asia/Singapore": ["新加坡"],
  "Asia/Taipei": ["台北"],
  "Asia/Tokyo": ["osaka", "kyoto", "japan", "东京", "大阪"],
  "Australia/Sydney": ["canberra", "悉尼"],
  "Europe/Berlin": ["munich", "hamburg", "cologne", "frankfurt", "germany", "柏林"],
  "Europe/London": ["edinburgh", "manchester", "england", "伦敦"],
  "Europe/Madrid": ["barcelona", "spain", "马德里"],
  "Europe/Moscow": ["莫斯科"],
  "Europe/Paris": ["lyon", "nice", "marseille", "france", "巴黎"],
  "Europe/Rome": ["milan", "naples", "venice", "italy", "罗马"],
  UTC: ["utc", "gmt"],
};

const ZONES = new Map(Object.entries(PLACES).flatMap(([zone, names]) => names.map((name) => [name, zone])));
for (const zone of Intl.supportedValuesOf("timeZone")) {
  ZONES.set(zone.toLowerCase(), zone);
  ZONES.set(zone.split("/").at(-1).replaceAll("_", " ").toLowerCase(), zone);
}

/** The time at a place, or here; throws an Error whose message is a sentence. `now` is a Date. */
export function timeAt(location, now) {
  const name = String(location ?? "").trim().toLowerCase();
  const zone = name === "" ? Intl.DateTimeFormat().resolvedOptions().timeZone : (ZONES.get(name) ?? ZONES.get(name.split(/[,，]/)[0].trim()));
  if (!zone) throw new Error(`The clock does not know the place ${name.slice(0, 60)}.`);
  const parts = new Intl.DateTimeFormat("en-CA", {
    timeZone: zone, year: "numeric", month: "2-digit", day: "2-digit", hour: "2-digit", minute: "2-digit", hourCycle: "h23",
  }).formatToParts(now);
  const part = (type) => parts.find((each) => each.type === type).value;
  return { date: `${part("year")}-${part("month")}-${part("day")}`, hour: Number(part("hour")), minute: Number(part("minute")) };
}
